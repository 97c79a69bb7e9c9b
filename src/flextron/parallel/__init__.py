"""One decoder on several processes."""
