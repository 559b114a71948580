"""One function per subcommand of ``training``; each calls one public function and prints what it found."""
