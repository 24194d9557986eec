from benchmarks.quality.studies import main

main()
