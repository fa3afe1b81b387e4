"""The training engine: one flat token layout, one attention entry, one loss head, one trainer base."""
