"""Result rows and the tables made of them."""
