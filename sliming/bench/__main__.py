from sliming.bench.everything import main

main()
