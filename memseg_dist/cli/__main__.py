from memseg_dist.cli.main import main

main()
