"""The public interface: what other training loops use. Everything else in the package is free to change."""
