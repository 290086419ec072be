-- Give back locks before they expire.
--   $1  lock ids      uuid[]  (sorted, so that two batches can't wait for each other)
--   $2  cooldowns     int[]   (seconds that each user rests)
--   $3  quarantines   text[]  (a reason takes the user out; null does not)
--   $4  clients       uuid[]  (whose lock it has to be; null: anybody's)
--   $5  outcomes      text[]  (how it went; null: not told)
--   $6  bad logins    int     (so many, with none that passed between them, take the user out; 0: never)
-- The lock id and its client are compared inside the update, so a late release from a test that has already
-- lost its lock can never free the next holder. A lock without a row back was not held. Where two clients (one
-- of them anybody) release a lock at once, it was held for one of them: `client` tells for which.
-- The ids are compared with the whole array too, because the planner, where few locks were held at the last
-- analyze, would else read all of the index first and compare after: slow beside an old snapshot, which keeps
-- dead entries alive (10,000 -> 1,700 requests/s).
with asked as (
    select lock_id, cooldown * interval '1 second' as cooldown, quarantine, client_id, outcome
    from unnest($1::uuid[], $2::int[], $3::text[], $4::uuid[], $5::text[])
        as asked (lock_id, cooldown, quarantine, client_id, outcome)
),
freed as (
    update locks
    set lock_id = null,
        ready_at = greatest(locks.acquired_at, least(clock_timestamp(), locks.expires_at)) + asked.cooldown,
        quarantine = coalesce(
            asked.quarantine,
            locks.quarantine,
            case
                when asked.outcome = 'bad-login' and locks.bad_logins + 1 >= nullif($6::int, 0)
                then (locks.bad_logins + 1) || ' locks ended in bad-login, and none between them in passed'
            end
        ),
        session_until = case
            when locks.quarantine is null and asked.quarantine is not null then null
            when locks.quarantine is null and asked.outcome = 'bad-login'
                and locks.bad_logins + 1 >= nullif($6::int, 0) then null
            else locks.session_until
        end,
        bad_logins = case asked.outcome
            when 'bad-login' then locks.bad_logins + 1
            when 'passed' then 0
            else locks.bad_logins
        end,
        last_outcome = coalesce(asked.outcome, locks.last_outcome)
    from asked
    where locks.lock_id = asked.lock_id
        and locks.lock_id = any($1::uuid[])
        and (asked.client_id is null or locks.client_id = asked.client_id)
        and locks.expires_at > clock_timestamp()
    returning asked.lock_id, asked.client_id as client, locks.user_id, locks.client_id, locks.fence,
        locks.holder, locks.note, locks.acquired_at, locks.ready_at - asked.cooldown as ended_at, asked.outcome,
        case
            when asked.quarantine is not null then asked.quarantine
            when asked.outcome = 'bad-login' and starts_with(locks.quarantine, locks.bad_logins || ' locks ended in')
            then locks.quarantine  -- by this release: a reason that stood before stays
        end as quarantined
),
recorded as (
    insert into history (lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, ended_by, outcome)
    select lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, 'released', outcome
    from freed
)
select lock_id, client, user_id, fence, holder, quarantined,
    extract(epoch from ended_at - acquired_at)::float8 as held_seconds
from freed
