"""Imported first by a process that measures, since what its libraries print would break the progress bar."""

from .terminal import calm_libraries


calm_libraries(debug=False)
