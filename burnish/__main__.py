from burnish.cli import main

raise SystemExit(main())
