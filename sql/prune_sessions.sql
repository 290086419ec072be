-- Forget sessions that have ended: by their time, by a new password or login, by a quarantine, with their user.
--   $1  how many at the most  int
-- One that is stored anew meanwhile stays: it is not the one that was seen.
with ended as materialized (
    select user_sessions.user_id, user_sessions.stored_at
    from user_sessions
    left join locks on locks.user_id = user_sessions.user_id
    where locks.session_until is null
        or locks.session_until <= clock_timestamp()
    limit $1::int
),
told as (
    update locks
    set session_until = null
    from ended
    where locks.user_id = ended.user_id
        and locks.session_until <= clock_timestamp()
)
delete from user_sessions
using ended
where user_sessions.user_id = ended.user_id
    and user_sessions.stored_at = ended.stored_at
