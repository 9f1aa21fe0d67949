"""Speed: `make bench` times this library beside itself unsteered and beside its peers, and writes RESULTS.md."""
