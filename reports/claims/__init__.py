"""The claims of papers, judged by records of studies."""
