"""What is told of a run afterwards: tables, pictures, pages."""
