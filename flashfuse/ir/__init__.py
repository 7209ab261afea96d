"""What attention *is*: score programs, masks, and the specification. Knows neither FX nor Triton."""
