"""A replicated SQLite for any schema: capture, merge, membership, spreading and repair."""
