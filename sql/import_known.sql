-- The users of an import's chunk that exist already.
--   $1 project_ids  $2 envs  $3 logins
select asked.ordinal, users.id, users.domain, users.labels, users.secret, user_codes.user_id, user_codes.key_id,
    user_codes.sealed, user_codes.period
from unnest($1::uuid[], $2::text[], $3::text[]) with ordinality as asked (project_id, env, login, ordinal)
join users using (project_id, env, login)
left join user_codes on user_codes.user_id = users.id
