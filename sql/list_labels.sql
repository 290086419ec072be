-- The keys of the labels of all users that fit: the columns of an export as CSV.
--   $1-$9  the filters of list_users.sql, which has $11 and $12 for the last of them
select distinct jsonb_object_keys(users.labels) as key
from users
join lock_states on lock_states.user_id = users.id
where ($1::uuid is null or users.project_id = $1::uuid)
    and ($2::text is null or users.env = $2::text)
    and ($3::text is null or users.domain = $3::text)
    and ($4::text is null or lock_states.state = $4::text)
    and ($5::text is null or (lock_states.state = 'locked' and lock_states.holder = $5::text))
    and ($6::text is null or users.login = $6::text)
    and ($7::jsonb is null or users.labels @> $7::jsonb)
    and ($8::uuid[] is null or users.project_id = any($8::uuid[]))
    and ($9::text is null or users.login like $9::text)
