"""The fixed part of ditbench: what every method shares and none may change."""
