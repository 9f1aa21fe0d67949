"""Engines: models that can be steered row by row. Each backend is imported only when it is used."""
