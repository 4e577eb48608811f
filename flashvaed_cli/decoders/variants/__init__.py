"""A decoder made into another: exact operators, single images, widened bypasses, scaled half precision, noise."""
