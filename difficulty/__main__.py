from difficulty.cli import main

main()
