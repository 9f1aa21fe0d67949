"""A model as a service: who may ask for which steering, requests that share batches, and what is told about them."""
