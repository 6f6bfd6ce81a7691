"""How a figure is made: cases, turns, counts of bytes and operations, facts of the machine."""
