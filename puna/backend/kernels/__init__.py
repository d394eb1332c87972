"""Native kernels for the CPU: products with weights as they are stored."""
