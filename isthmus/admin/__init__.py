"""The admin listener: JSON API, metrics, dashboard."""
