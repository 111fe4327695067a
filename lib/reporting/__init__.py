"""Reading finished runs, comparing them, and writing tables and figures. Nothing here loads a model or torch."""
