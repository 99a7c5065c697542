"""In which order a canvas is written, and the phenomena of it, each with a number and a null of its own."""
