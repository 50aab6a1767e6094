"""Imported first by a process that measures, since what its libraries print would break the progress bar."""

from .libraries import quiet_libraries


quiet_libraries()
