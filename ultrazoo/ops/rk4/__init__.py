"""The algebra of a classic Runge-Kutta step, fused."""
