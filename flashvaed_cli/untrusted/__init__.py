"""Open untrusted files: bounded in time and memory, and never running code from them."""
