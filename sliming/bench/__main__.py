from sliming.bench.run import main

main()
