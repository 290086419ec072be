-- Forget sessions whose time is up.
--   $1  how many at the most  int
-- One that is stored anew meanwhile stays: its time is looked at once more. Those that ended before their time, by a
-- new password or a quarantine, nobody is told any more; they stay sealed until it has come.
with ended as materialized (
    select user_id
    from user_sessions
    where ends_at <= (select clock_timestamp())
    order by ends_at
    limit $1::int
),
told as (
    update locks
    set session_until = null
    from ended
    where locks.user_id = ended.user_id
        and locks.session_until <= clock_timestamp()
    returning locks.user_id
)
delete from user_sessions
using ended
where user_sessions.user_id = ended.user_id
    and user_sessions.ends_at <= clock_timestamp()
    and (select count(*) from told) >= 0  -- the rows of locks first, as put_session.sql does
