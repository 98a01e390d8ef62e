"""Deploys: from one release of an app to the next, gated by checks, and back by itself."""
