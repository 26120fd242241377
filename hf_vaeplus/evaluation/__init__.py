"""What a pipeline has learnt, in figures, tables and pictures."""
