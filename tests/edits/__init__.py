"""A package, so that no module of the name `edits` elsewhere (the benchmark of that name) takes its place."""
