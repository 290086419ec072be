-- Spend the present step of a user's one-time codes, so that its code is given out once, over all replicas.
--   $1  lock id         uuid
--   $2  client          uuid: whose lock it has to be; null: authentication is off
--   $3  seconds before the end of a step from which its code is not given any more  int
-- Calls for one user take turns at its row of user_codes, and only then look at the lock, whose row nobody changes
-- until the commit: so the row of the lock, which renewals and releases want, is held for a moment. The clock is the
-- database's, read when both are had. No row comes back where the lock is not held; a null period is a user without
-- codes. `given` is whether the step that began at `began` was spent; else one may be had in `wait_seconds`.
with code as materialized (
    select user_codes.*
    from user_codes
    where user_id = (select user_id from locks where lock_id = $1::uuid)
        and sealed is not null
    for update
),
held as materialized (
    select locks.lock_id, locks.user_id, locks.fence, locks.holder, locks.expires_at, code.key_id, code.sealed,
        code.period, code.spent_until
    from locks
    left join code on code.user_id = locks.user_id
    where locks.lock_id = $1::uuid
        and ($2::uuid is null or locks.client_id = $2::uuid)
    for update of locks
),
moment as materialized (
    select held.*, now, floor(now / period)::bigint * period as began
    from held
    cross join lateral (
        select extract(epoch from clock_timestamp())::float8 as now, held.lock_id
        offset 0
    ) as clock
    where held.expires_at > to_timestamp(now)
),
spent as (
    update user_codes
    set spent_until = moment.began + moment.period
    from moment
    where user_codes.user_id = moment.user_id
        and moment.began >= moment.spent_until
        and moment.began + moment.period - moment.now > $3::int
    returning user_codes.user_id
)
select moment.*, spent.user_id is not null as given, to_timestamp(began + period) as valid_until,
    (greatest(began + period, ceil(spent_until::float8 / period) * period) - now)::float8 as wait_seconds
from moment
left join spent on spent.user_id = moment.user_id
