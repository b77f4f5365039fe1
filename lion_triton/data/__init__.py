"""Where point clouds come from: procedural furniture, folders of clouds, meshes."""
