-- The index of the held locks by expiry, for those statements alone that ask for it.
-- A release knows that its lock is held, so it could read this index from end to end instead of looking the
-- lock id up, and while few locks were held at the last analyze the planner took both for equally cheap:
-- beside an old snapshot, which keeps dead entries alive, the rate then fell from 8,000 to 1,500 requests/s.
-- Naming the holder, which a release does not do, makes it unfit for anything else. (Not the ttl, because
-- renewals change that and would no longer be HOT updates.)
drop index locks_due;

create index locks_due on locks (ready_at) where lock_id is not null and holder is not null;
