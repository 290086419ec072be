-- Tell the planner of the new rows at once; autovacuum would take a while.
analyze users, locks, pools
