"""One function per subcommand of ``difficulty``; each calls one public function and prints what it found."""
