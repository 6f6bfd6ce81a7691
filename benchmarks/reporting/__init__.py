"""Result files in, tables and pictures out."""
