"""What every part uses: devices, processes, files, streams, drawing."""
