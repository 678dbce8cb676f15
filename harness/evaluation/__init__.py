"""From a backbone to its metrics: samples, features, distances."""
