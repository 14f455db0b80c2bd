"""What every room uses: errors, lines on the terminal, files and their schemas."""
