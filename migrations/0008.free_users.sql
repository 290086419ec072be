-- Who can be handed out at this moment, said once for all statements that hand out or look: not quarantined, rested,
-- and not locked, or only by a lock that has expired.
-- The planner takes the view apart, so each statement still reads by the index that it asks for, and `for update`
-- locks the row itself, whose place (its ctid) leads an update back to it. The subselect lets an index compare with
-- the clock, which is read once a statement; a clock that is a moment late takes over nobody too early.
create view free_users as
select ctid as place, user_id, pool_id, fence, ready_at, lock_id, client_id, holder, acquired_at, expires_at
from locks
where quarantine is null
    and ready_at <= (select clock_timestamp())
    and (lock_id is null or expires_at <= clock_timestamp());
