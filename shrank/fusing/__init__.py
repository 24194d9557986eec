"""What follows a low-rank layer in a graph becomes part of its op: activation, residual, batch norm."""
