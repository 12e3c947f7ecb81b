"""GIF in the shapes that other trainers expect. Each module needs the library it is named after, or none."""
