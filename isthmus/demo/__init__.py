"""A small world on one computer: three regions, a node in each, and a web app with machines in all."""
