"""What at least two op families use."""
