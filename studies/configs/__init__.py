"""From words and YAML to configs."""
