"""Clients that weigh too much for every test run: `make test-clients` gives each an environment of its own."""
