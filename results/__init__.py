"""Result rows, and the tables, figures and report made of them."""
