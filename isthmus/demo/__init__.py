"""A small world on one computer: three regions, a node in each, and a web app with machines in all."""

# Every write goes to the machines of this region, as in an app with one primary database.
PRIMARY_REGION = "iad"
