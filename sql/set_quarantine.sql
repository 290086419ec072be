-- Take a user out (or put it back, with null). A current lock runs on, a session ends as a quarantine begins, and
-- bad logins are counted anew as it ends. No row comes back where nothing changes.
--   $1  user id  uuid
--   $2  reason   text or null
update locks
set quarantine = $2::text,
    ready_at = case
        when lock_id is null and $2::text is null and quarantine is not null then greatest(ready_at, clock_timestamp())
        else ready_at
    end,
    bad_logins = case when $2::text is null then 0 else bad_logins end,
    session_until = case when quarantine is null then null else session_until end
where user_id = $1::uuid
    and quarantine is distinct from $2::text
returning user_id
